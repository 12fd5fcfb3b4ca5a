"""Quantised tensors, each as what it is made of: decoded on the way in, encoded on the way out.

A scheme says which stored tensors belong together and what they mean; here they become derived tensors
(`dconv.sharding.derived`) whose recipes call `dconv.codec`. Nothing is computed before a box is asked for.
"""
