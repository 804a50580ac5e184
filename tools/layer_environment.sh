# To be sourced: `layer BASE VENV` makes the virtual environment VENV, which sees the packages of BASE.
#
# It sets `packages` and `own_packages`, the directories of packages of BASE and of VENV. What VENV has itself comes
# first.
layer() {
    "$1/bin/python" -m venv --clear "$2"
    packages=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    own_packages=$("$2/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    # As a site directory, because the editable install of this package is a .pth file there.
    echo "import site; site.addsitedir('$packages')" > "$own_packages/base_environment.pth"
}
