"""What a run does about faults: numbers that go wrong, crashes, processes that stop or lag."""
