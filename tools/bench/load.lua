-- What wrk runs, in one thread, in a folder that holds whole HTTP requests as the files 1, 2, …: it sends them in turn.
-- The figures come out as one line of JSON after the mark MARINA, then the body of the first answer that is not 200.

function setup(thread)
   worker = thread
end

function init()
   requests, turn = {}, 0
   wrong, first_status, first_body = 0, 0, ""
   local file = io.open("1", "rb")
   while file do
      requests[#requests + 1] = file:read("*a")
      file:close()
      file = io.open(tostring(#requests + 1), "rb")
   end
end

function request()
   turn = turn % #requests + 1
   return requests[turn]
end

function response(status, headers, body)
   if status ~= 200 then
      if wrong == 0 then
         first_status, first_body = status, body:sub(1, 1000)
      end
      wrong = wrong + 1
   end
end

function done(summary, latency)
   local errors = summary.errors
   io.write(string.format(
      '\nMARINA {"microseconds": %d, "answers": %d, "wrong": %d, "first_status": %d, "broken": %d, "late": %d, '
         .. '"p50": %d, "p90": %d, "p99": %d}\n%s',
      summary.duration, summary.requests, worker:get("wrong"), worker:get("first_status"),
      errors.connect + errors.read + errors.write, errors.timeout,
      latency:percentile(50), latency:percentile(90), latency:percentile(99), worker:get("first_body")
   ))
end
