# For login shells of PBS jobs, as zz-stager.sh. Quoted, the pattern would be a text in some csh.
if ($?STAGER_PATH && $?PBS_JOBID) then
    if (":${PATH}:" !~ *:${STAGER_PATH}:*) setenv PATH "${STAGER_PATH}:${PATH}"
endif
