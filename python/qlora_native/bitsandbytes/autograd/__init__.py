"""bitsandbytes.autograd: the 4-bit matrix product and its gradient."""
