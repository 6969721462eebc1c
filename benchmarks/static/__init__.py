"""What the compiler made of every kernel, for GPUs that need not be present.

    python -m benchmarks.static --target sm_90 [--op attention] [--json] [--jobs 2]

``workloads`` names shapes that reach every row of a tuning table, ``compilation`` records and compiles the launches they make,
``machine_code`` reads registers, spills and instructions, the hottest loop's apart, ``inspection`` does all of it for a table and
says what must not be, and ``snapshot`` holds what CI compares.
"""
