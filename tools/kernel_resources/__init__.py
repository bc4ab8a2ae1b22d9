"""What the compiler makes of every kernel variant, by ahead-of-time compiles. Needs Triton and no GPU.

    python -m tools.kernel_resources --target sm_90 gfx942

For NVIDIA targets the machine code is read back with the cuobjdump that the Triton wheel carries; for AMD the listing
the compiler itself prints is read. `Resources` holds registers, spills, load widths and the instruction count of the
main loop, so a test can hold the kernels to a recorded budget and a reader can see the effect of a change.

    variant.py    what a variant is         rows.py, ...   the variants of each kernel family
    catalogue.py  all of them by name       compile.py     compiling        listing.py   reading machine code
"""
