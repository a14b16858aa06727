"""`python -m layerskip`, which is also how torchrun and accelerate start a process per device."""

from layerskip.cli.main import main

main()
