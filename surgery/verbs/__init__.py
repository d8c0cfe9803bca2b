"""What the command line can do, a function for each verb: parse, call the API, print."""
