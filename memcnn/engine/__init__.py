"""The engine of reversible blocks: forget activations in the forward pass, rebuild them in the backward pass.

Read recompute.py first: it opens with the rules and one worked example.

==================  ==================================================================================================
``recompute``       one evaluation of a module: the tensors that autograd saves are dropped
``second``          the second evaluation of that module, which fills the dropped tensors again
``chain``           the values between blocks, and the order in which they are rebuilt
``couple``          ``split``, ``couple`` and ``merge``, the three functions that couplings are written with
``direct``          up to eight additive blocks of PyTorch's own layers as two graph nodes: which blocks, and why
``direct_run``      what these blocks compute in forward and backward
``direct_nodes``    the two graph nodes
``sums``            the sums of additive blocks
``opaque``          modules that offer nothing but ``forward`` and ``inverse``
``replay``          what the second evaluation must see as the first did: random numbers, autocast, modes, parameters
``quiet``           the short replay of branches that consist of PyTorch's own layers, as most do
``survey``          which branches these are, and whether one has changed since
``buffers``         the part of the replay for buffers, such as running statistics
``again``           the second evaluation as a context: restore what the first one saw, and undo that at the end
``identity``        whether a tensor was modified or replaced since
``hooks``           forward hooks of the user: the second evaluation calls only those that changed a value
``generators``      every random generator that a branch may draw from
``attributes``      plain attributes of modules, such as the rate of a dropout
``references``      plain attributes that are tensors or containers
``arguments``       arguments of a module that are not rebuilt, but stored
``checksum``        changes of tensors that PyTorch does not count
``retained``        when rebuilt tensors are dropped again under ``retain_graph=True``
``drift``           the drift watch: compares rebuilt activations with the first ones, in a few sampled evaluations
``rounding``        the relative error of a rebuilt tensor
``exact``           inversion without rounding, on a grid
``capture``         what cannot be done while a CUDA graph is captured
``torch_private``   every private name of PyTorch that the engine uses, each with its reason
==================  ==================================================================================================
"""
