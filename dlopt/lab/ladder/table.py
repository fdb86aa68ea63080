WIDTH=100
def lines(results, width=100):
    return [str(results.analysis)]
