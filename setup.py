"Packaging, read from settings.ini so that every fact is written once."

from configparser import ConfigParser

from setuptools import find_packages, setup

config = ConfigParser(delimiters=['='], interpolation=None)
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    license='MIT',
    author=cfg['author'],
    python_requires='>='
    + cfg['min_python']
    + ',<3.14',  # 3.14 keeps the annotations of a notebook's parameters elsewhere
    packages=find_packages(include=['xcl', 'xcl.*']),
    install_requires=cfg['requirements'].split(),
    extras_require={
        extra: cfg[f'{extra}_requirements'].split()
        for extra in ('dev', 'app', 'site', 'slurm', 'onnx')
    },
    long_description=open('README.md', encoding='utf-8').read(),
    long_description_content_type='text/markdown',
    entry_points={'nbdev': [f'{cfg["lib_name"]}={cfg["lib_path"]}._modidx:d']},
)
