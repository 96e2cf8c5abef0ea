"""An accelerator that is late, simulated on a CPU, and the tests of everything that copies beside a forward.

On a GPU a wait that is missing gives wrong bytes now and then. Here it gives them every time: what is queued on a
stream is done as late as the device may do it. `LateDevice` is the device, `Forward` a model that reads and writes KV
beside our copies, `waits` the list of every wait in the product with the tests that notice when it is gone.
docs/testing.md says what this cannot show.
"""
