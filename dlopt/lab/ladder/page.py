def write(results, folder):
    from dlopt.files import write_atomically
    from dlopt.lab.ladder.results import to_json
    write_atomically(folder/"results.json", to_json(results).encode())
    return [folder/"results.json"]
