# shellcheck shell=sh
# For login shells of PBS jobs: /etc/profile makes PATH anew, and with it what stager put there is
# lost. Its name makes it the last. Does nothing in any other shell.
if [ -n "${STAGER_PATH-}" ] && [ -n "${PBS_JOBID-}" ]; then
    case ":$PATH:" in
        "$STAGER_PATH":* | *":$STAGER_PATH:"*) ;;
        *) PATH=$STAGER_PATH:$PATH ;;
    esac
fi
