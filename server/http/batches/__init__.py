"""Runs the batches of /v1/batches: files with one request per line, which run in the background.

| module | what it does |
| --- | --- |
| endpoints.py | the endpoints that lines may call |
| lines.py | checks the lines of an input file |
| order.py | the order in which lines run, so that a shared beginning of prompts is computed once |
| call.py | calls an endpoint with the body of a line |
| results.py | the lines of the output file and of the error file |
| table.py, store.py | the SQL, and its interface without blocking |
| job.py, runner.py | a batch that runs, and the task that runs all batches |
"""
