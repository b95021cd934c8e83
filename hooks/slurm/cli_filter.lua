-- Slurm's cli_filter/lua plugin (CliFilterPlugins=cli_filter/lua, this file as cli_filter.lua in
-- the directory of slurm.conf): tells the user at submit time that an environment is not packed or
-- changed since. It runs in sbatch, salloc and srun as the user; it only ever warns, because the
-- job would run on the original environment.

-- An environment that has not changed is not looked at again by every node when the job starts: the
-- directive gets `on_stale=ignore`. What changes while the job is queued is then not noticed; with
-- false, each node looks, and asks shared storage for seven names more.
local CHECKED_IS_CHECKED = true

-- What stands behind `pyenv:`, and where in the comment it ends.
local function directive(comment)
    if comment == nil or #comment > 1000 then
        return nil
    end
    local token, behind = (" " .. comment):match("[%s,;]pyenv:([^%s,;]+)()")
    if token ~= nil then
        return token, behind - 2
    end
    token, behind = comment:match('"pyenv"%s*:%s*"([^"]+)()"')
    return token, behind and behind - 1
end

-- Everything but these characters would have to be quoted for the shell: then nothing is asked.
local function is_plain(ref)
    return ref:match("^[%w._/~@:-]+$") ~= nil and ref:sub(1, 1) ~= "-"
end

-- Tells the user what is wrong; returns whether nothing is.
local function check(ref)
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
    return problem == nil and said:match('"changed": %[%s*%]') ~= nil
end

function slurm_cli_setup_defaults(options, early_pass)
    return slurm.SUCCESS
end

function slurm_cli_pre_submit(options, offset)
    local comment = options["comment"]
    local asked, behind = directive(comment)
    if asked == nil then
        return slurm.SUCCESS
    end
    local fresh = true
    for ref in asked:gsub("%?.*$", ""):gmatch("[^+]+") do
        fresh = is_plain(ref) and check(ref) and fresh
    end
    if fresh and CHECKED_IS_CHECKED and not asked:find("on_stale=", 1, true) then
        local mark = asked:find("?", 1, true) and "&" or "?"
        options["comment"] = comment:sub(1, behind) .. mark .. "on_stale=ignore"
            .. comment:sub(behind + 1)
    end
    return slurm.SUCCESS
end

function slurm_cli_post_submit(offset, jobid, stepid)
    return slurm.SUCCESS
end
