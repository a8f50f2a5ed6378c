// What the pretended libraries share. It lives in the pretended CUDA runtime.
#pragma once

#include <cstddef>

extern "C" {
void standin_note(const char* text);                  // a line of the log, for whoever reads it to find a place again
void standin_launch(const char* text, void* stream);  // work put on a stream: a node, where the stream is captured
void standin_absent(const char* call);                // a call that nothing stands in for
int standin_devices();                                // how many there are
void standin_describe(int number, char* name, size_t size, unsigned char* uuid);  // of 16 bytes
}
