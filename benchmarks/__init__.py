"""The instruments: ahead-of-time inspection (``static``), timing on a GPU (``gpu``), whole models on a CPU (``cpu_models``)."""
