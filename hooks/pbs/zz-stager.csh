# For login shells of PBS jobs, as zz-stager.sh.
if ($?STAGER_PATH && $?PBS_JOBID) then
    if (":${PATH}:" !~ "*:${STAGER_PATH}:*") setenv PATH "${STAGER_PATH}:${PATH}"
endif
