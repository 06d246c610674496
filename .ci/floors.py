"""Print the lowest versions that setup.cfg declares, one a line as `name==version`, without torch's."""

from configparser import ConfigParser

settings = ConfigParser()
settings.read("setup.cfg")
for line in settings["options"]["install_requires"].split():
    name, _, versions = line.partition(">=")
    if name != "torch":
        print(f"{name}=={versions.split(',')[0]}")
