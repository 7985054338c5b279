-- What Lonestar6 refuses. From its running.md (2026): -N with -n (or with --ntasks-per-node), -t and -p are required; with --mem "the
-- scheduler will not accept your job"; jobs that ask for specific nodes are deleted (nospecificnodes.md, 2026-05-19). --gres ("not
-- supported, Slurm will reject") and --gpus of any kind need no rule here: Slurm's own sbatch refuses them where there are no GRES.
-- The words after FAILED are ours.

local function set(number, unset)
   return number ~= nil and number ~= unset
end

local function given(text)
   return text ~= nil and text ~= ""
end

local function refusal(job)
   if set(job.min_mem_per_node, slurm.NO_VAL64) or set(job.min_mem_per_cpu, slurm.NO_VAL64) then
      return "--mem options are not supported: all memory of the nodes is yours"
   end
   if not given(job.partition) then
      return "a queue is required (-p)"
   end
   if not set(job.time_limit, slurm.NO_VAL) then
      return "a time limit is required (-t)"
   end
   if not set(job.min_nodes, slurm.NO_VAL) then
      return "the number of nodes is required (-N)"
   end
   if not set(job.num_tasks, slurm.NO_VAL) and not set(job.ntasks_per_node, slurm.NO_VAL16) then
      return "the number of tasks is required (-n or --ntasks-per-node)"
   end
   if given(job.req_nodes) then
      return "specific nodes cannot be asked for (-w)"
   end
end

function slurm_job_submit(job, partitions, user)
   local why = refusal(job)
   if why == nil then
      return slurm.SUCCESS
   end
   slurm.log_user("FAILED: " .. why)
   return slurm.ERROR
end

function slurm_job_modify(job, record, partitions, user)
   return slurm.SUCCESS
end

return slurm.SUCCESS
