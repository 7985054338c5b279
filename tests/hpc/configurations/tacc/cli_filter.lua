-- What Lonestar6's sbatch itself does. On a compute node it only says that it is not available there (user records of 2026-06-16 to
-- 2026-07-21; one found a shell function, so the real program may work by its path: here it does not). On a login node it prints a
-- banner and its checks to stdout, also with --parsable, before the job id (a user's pipeline of 2026, TACC's own course pages).

-- Whether this process descends from a job step: the environment may be cleaned, the parents cannot.
local function inside_a_job()
   local pid = "self"
   while pid ~= "0" and pid ~= "1" do
      local file = io.open("/proc/" .. pid .. "/stat")
      if file == nil then
         return false
      end
      local line = file:read("*l")
      file:close()
      if line:match("%((.*)%)") == "slurmstepd" then
         return true
      end
      pid = line:match(".*%) %S+ (%d+)")
   end
   return false
end

local banner = [[

-----------------------------------------------------------------
          Welcome to the Lonestar6 Supercomputer
-----------------------------------------------------------------

No reservation for this job
--> Verifying valid submit host (login1)...OK
--> Verifying valid jobname...OK
--> Verifying valid ssh keys...OK
--> Verifying access to desired queue...OK
--> Checking available allocation...OK]]

function slurm_cli_setup_defaults(options, early)
   return slurm.SUCCESS
end

function slurm_cli_pre_submit(options, offset)
   if options["type"] ~= "sbatch" then
      return slurm.SUCCESS
   end
   if inside_a_job() then
      print("NOTIFICATION: sbatch not available on compute nodes. Use a login node.")
      return slurm.ERROR
   end
   print(banner)
   return slurm.SUCCESS
end

function slurm_cli_post_submit(offset, job, step)
   return slurm.SUCCESS
end

return slurm.SUCCESS
