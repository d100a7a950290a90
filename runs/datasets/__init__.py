"""Fixed data for offline agents: files in, transitions out, and the other way round.

Here belongs what reads Minari folders, D4RL's HDF5 files and plain arrays, what writes the first two, what draws
mixtures of whole episodes, and what is said of data: fingerprints, cards, reference pairs. h5py and minari are imported
when used; they come with `pip install 'neoteny[offline]'`.
"""
