"""What `agentstate bench` runs: workloads, a simulator, measurements, and the page that is written from them."""
