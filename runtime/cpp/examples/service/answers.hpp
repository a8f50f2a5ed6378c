// What is sent back.
#pragma once

#include <httplib.h>

#include "job.hpp"
#include "metrics.hpp"

// The samples of a finished job, and which of them are not finite. Throws Refusal for pictures of such.
void answer(httplib::Response& response, const Job& job, const tarflow_shape& shape, Metrics& metrics);

void refuse(httplib::Response& response, const Refusal& refusal);
