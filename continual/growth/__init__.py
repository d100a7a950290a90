"""Networks that grow while they learn: function-preserving operators, what is inherited, and how to choose a growth.

`protocol` is what a model offers to whoever grows it; `axes`, `depth` and `slots` are operators on weights, whatever
the network; the dual encoder of image-text pairs and GrowCLIP are built on them.
"""
