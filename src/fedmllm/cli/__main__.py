"""`python -m fedmllm.cli`."""

from fedmllm.cli.main import main

main()
