"""JavaScript libraries that the site loads: fetched once by npm, then read from the cache."""

import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from mft_nb.files import cache_folder, whole


def fetch_package(package, version):
    """The archive of one exact version of an npm package; npm checks what it fetches."""
    target = cache_folder() / "npm" / f"{package.replace('/', '+')}-{version}.tgz"
    if target.exists():
        return target
    npm = shutil.which("npm")
    if not npm:
        raise FileNotFoundError("there is no npm to fetch its libraries. Install Node.js.")
    with tempfile.TemporaryDirectory() as scratch:
        command = [npm, "pack", f"{package}@{version}", "--silent", "--ignore-scripts"]
        command += ["--fetch-retries=1", "--fetch-retry-mintimeout=1000"]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
        files = list(Path(scratch).glob("*.tgz"))
        if done.returncode or len(files) != 1:
            raise FileNotFoundError(
                f"npm could not fetch {package} {version}. Connect to its registry once."
            )
        with whole(target) as part:
            shutil.copyfile(files[0], part)
    return target


def packed_files(package, version, wanted):
    """The content of some files of a package: those for which `wanted` gives a name, by it."""
    found = {}
    with tarfile.open(fetch_package(package, version)) as archive:
        for member in archive.getmembers():
            name = wanted(member.name.removeprefix("package/"))
            if name and member.isfile():
                found[name] = archive.extractfile(member).read()
    return found
