def write(results, page):
    return ""
