"""Speed and memory of peft_ops and of its peers: pytest-benchmark suites, a report, and one command for a GPU."""
