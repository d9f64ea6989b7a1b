"""Looking at the nodes of a job before it trains: versions, devices, links, files, clocks."""
