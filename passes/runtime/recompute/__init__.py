"""Keep the results of convolutions and build everything else again in the backward pass.

Read in this order: ``operators`` (what can run twice), ``values`` (how a tensor can be had again),
``tape`` (the forward as it runs), ``fusing`` (fewer tensors at once in the backward), ``around``
(the hooks on the model).
"""
