def refusal(module):
    return "not there yet"
