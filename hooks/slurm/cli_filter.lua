-- Slurm's cli_filter/lua plugin (CliFilterPlugins=cli_filter/lua, this file as cli_filter.lua in
-- the directory of slurm.conf): tells the user at submit time that an environment is not packed or
-- changed since. It runs in sbatch, salloc and srun as the user; it only ever warns, because the
-- job would run on the original environment.

local function directive(comment)
    if comment == nil or #comment > 1024 then
        return nil
    end
    local token = (" " .. comment):match("[%s,;]pyenv:([^%s,;]+)")
    if token == nil then
        token = comment:match('"pyenv"%s*:%s*"([^"]+)"')
    end
    return token
end

-- Everything but these characters would have to be quoted for the shell: then nothing is asked.
local function is_plain(ref)
    return ref:match("^[%w._/~@:-]+$") ~= nil and ref:sub(1, 1) ~= "-"
end

local function warn(ref)
    -- Ends by itself, and quickly: somebody waits for the prompt.
    local command = "timeout 10 stager inspect --json " .. ref .. " 2>&1"
    local pipe = io.popen(command)
    if pipe == nil then
        return
    end
    local said = pipe:read("*a") or ""
    pipe:close()
    local problem = said:match("stager: error: ([^\n]+)")
    local hint = said:match("hint: ([^\n]+)")
    if problem == nil and said:match('"changed": %[%s*"') then
        problem = "`" .. ref .. "` changed since it was packed"
        hint = "the job's first node packs it again; to have it ready: stager pack"
    end
    if problem ~= nil then
        slurm.log_info("stager: warning: %s", problem)
        if hint ~= nil then
            slurm.log_info("stager: hint: %s", hint)
        end
    end
end

function slurm_cli_setup_defaults(options, early_pass)
    return slurm.SUCCESS
end

function slurm_cli_pre_submit(options, offset)
    local names = directive(options["comment"])
    if names == nil then
        return slurm.SUCCESS
    end
    names = names:gsub("%?.*$", "")
    for ref in names:gmatch("[^+]+") do
        if is_plain(ref) then
            warn(ref)
        end
    end
    return slurm.SUCCESS
end

function slurm_cli_post_submit(offset, jobid, stepid)
    return slurm.SUCCESS
end
