"""`python -m rloop_cli`: the same as `rloop`, for `accelerate launch -m rloop_cli ...`."""

from rloop_cli.app import main

main()
