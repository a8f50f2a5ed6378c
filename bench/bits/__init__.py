"""The bits a checkout computes, recorded, so that a later checkout can be compared with an earlier one."""
