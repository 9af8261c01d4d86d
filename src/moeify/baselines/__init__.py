"""Published methods to compare with that are no mixture of experts: early exit (`ztw`). MoEfication needs no module of its own."""
