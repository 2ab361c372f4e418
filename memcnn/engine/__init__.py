"""The engine of reversible blocks: forget activations in the forward pass, rebuild them in the backward pass.

Read ``recompute`` first: it opens with the rules and one worked example.

==================  ==================================================================================================
``recompute``       one evaluation of a module: the tensors that autograd saves are dropped, and rebuilt by a second one
``second``          that second evaluation, which gives each saved tensor back
``chain``           the values between blocks, and the order in which they are rebuilt
``couple``          ``split``, ``couple`` and ``merge``, the three functions that couplings are written with
``direct``          the short way of runs of quiet additive blocks: two graph nodes for a run, nothing saved
``sums``            the sums of additive blocks
``opaque``          modules that offer nothing but ``forward`` and ``inverse``
``replay``          what the second evaluation must see as the first did: random numbers, autocast, modes, parameters
``quiet``           the short replay of branches that consist of PyTorch's own layers, as most do
``buffers``         the part of the replay that looks after buffers, such as running statistics
``again``           the second evaluation as a context: restore what the first one saw, and undo that at the end
``identity``        whether a tensor is still the one that was seen
``hooks``           forward hooks of the user: called once, except those that changed a value, which change it again
``generators``      every random generator that a branch may draw from
``attributes``      plain attributes of modules, such as the rate of a dropout
``references``      plain attributes that are tensors or containers
``arguments``       arguments of a branch that are no streams
``checksum``        changes of tensors that PyTorch does not count
``retained``        when rebuilt tensors are dropped again under ``retain_graph=True``
``drift``           a watch over rebuilt activations, in a few sampled steps
``rounding``        the relative error of a rebuilt tensor
``exact``           inversion without rounding, on a grid
``capture``         what cannot be done while a CUDA graph is captured
``torch_private``   every private name of PyTorch that the engine uses, each with its reason
==================  ==================================================================================================
"""
