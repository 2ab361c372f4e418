"""The former place of ``memcnn.memory.prediction``: every name can still be imported from here."""

from memcnn.memory.prediction import SGD, Batch, Loss, MakeOptimizer, predict_step_memory, step_flops, training_step

__all__ = ["SGD", "Batch", "Loss", "MakeOptimizer", "predict_step_memory", "step_flops", "training_step"]
