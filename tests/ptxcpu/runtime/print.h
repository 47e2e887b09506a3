// printf and assert of device code.
#pragma once
#include "memory.h"

INLINE std::string host_string(Thread* t, u64 address, u32 line) {
    std::string s;
    for (; s.size() < 4096; address++) {
        char c = *generic_load(t, address, 1, t->block->launch->desc->sites, line, true);
        if (!c) break;
        s += c;
    }
    return s;
}
// int vprintf(format, arguments): arguments are packed with their natural alignment.
NOINLINE void device_vprintf(Thread* t, char* result, char* format_pointer, char* arguments_pointer, u32 line) {
    u64 format_address, at;
    memcpy(&format_address, format_pointer, 8), memcpy(&at, arguments_pointer, 8);
    std::string format = host_string(t, format_address, line), out;
    const u32 spare = t->block->launch->desc->sites;
    for (size_t i = 0; i < format.size(); i++) {
        if (format[i] != '%') {
            out += format[i];
            continue;
        }
        if (format[i + 1] == '%') {
            out += '%', i++;
            continue;
        }
        size_t end = format.find_first_of("diouxXeEfFgGaAcsp", i + 1);
        if (end == std::string::npos) break;
        std::string spec = format.substr(i, end - i);
        const char kind = format[end];
        bool is_long = spec.find('l') != std::string::npos;
        spec.erase(std::remove_if(spec.begin(), spec.end(), [](char c) { return c == 'l' || c == 'h'; }), spec.end());
        const bool eight = is_long || strchr("eEfFgGaAsp", kind);
        const u32 size = eight ? 8 : 4;
        at = (at + size - 1) & ~(u64)(size - 1);
        char text[512];
        u64 raw = 0;
        memcpy(&raw, generic_load(t, at, size, spare, line, true), size);
        at += size;
        if (kind == 's')
            snprintf(text, sizeof text, (spec + "s").c_str(), host_string(t, raw, line).c_str());
        else if (kind == 'p')
            snprintf(text, sizeof text, "0x%llx", (unsigned long long)raw);
        else if (kind == 'c')
            snprintf(text, sizeof text, (spec + "c").c_str(), (int)raw);
        else if (strchr("di", kind))
            snprintf(text, sizeof text, (spec + "ll" + kind).c_str(), eight ? (long long)raw : (long long)(s32)raw);
        else if (strchr("ouxX", kind))
            snprintf(text, sizeof text, (spec + "ll" + kind).c_str(), (unsigned long long)raw);
        else
            snprintf(text, sizeof text, (spec + kind).c_str(), bits<f64>(raw));
        out += text;
        i = end;
    }
    std::lock_guard<std::mutex> guard(t->block->launch->mutex);
    if (t->block->launch->output.size() < (8u << 20)) t->block->launch->output += out;
    u32 zero = 0;
    memcpy(result, &zero, 4);
}
// void __assertfail(message, file, line, function, char_size)
NOINLINE void device_assertfail(Thread* t, char* message, char* file, char* number, char* function, u32 line) {
    u64 m, f, fn;
    u32 n;
    memcpy(&m, message, 8), memcpy(&f, file, 8), memcpy(&n, number, 4), memcpy(&fn, function, 8);
    raise_fault(t, FAULT_ASSERT, line, 0, "assertion `%s' failed at %s:%u in %s", host_string(t, m, line).c_str(),
                host_string(t, f, line).c_str(), n, host_string(t, fn, line).c_str());
}
