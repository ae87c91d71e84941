"""The files of a measurement on disk, and nothing else: table to bytes, bytes to table.

store         json, npz and _mod_list.json of a rank
nested        tables into the nested dicts and lists that both hold, and back
json_form     the json as fixed text with numbers in between
pickle_form   the pickle in the npz, likewise
npz           the archive around it
background    files written while the next content is made
channel_file  `channel_ranges.safetensors`
convergence_file  `convergence.json`
"""
