"""The tests of BackendContract, one group per file."""
