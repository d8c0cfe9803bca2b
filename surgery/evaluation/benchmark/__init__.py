"""Speed and memory of a converted model beside its base, in one run, in turn."""
