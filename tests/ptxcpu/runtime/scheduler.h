// Runs the threads of one block: fibers that take turns until each has exited.
#pragma once
#include "warp.h"

static thread_local Thread* entering;
static void thread_main() {
    Thread* t = entering;
    t->block->launch->kernel(t);
    t->state = EXITED;
    t->block->exited++;
    t->warp->live &= ~(1u << t->lane);
    t->warp->runnable &= ~(1u << t->lane);
    if (t->warp->waiting) release_warp_ops(*t->warp);
    for (;;) yield_to_scheduler(t);
}

static void prepare_threads(Block& b) {
    b.exited = 0;
    for (u32 w = 0; w < b.warps_count; w++) b.warps[w].live = b.warps[w].waiting = 0;
    for (u32 i = 0; i < b.threads_count; i++) {
        Thread& t = b.threads[i];
        Warp& warp = b.warps[i / 32];
        warp.live |= 1u << t.lane, warp.runnable = warp.live;
        t.state = RUNNABLE, t.group = 0, t.fuel = 100000;
        t.copies.clear();
        // stagger the stacks, else equal frames of all threads fall into the same cache sets
        void** sp = (void**)(t.stack + b.stack_bytes - 64 - (i % 32) * 832);
        sp = (void**)((u64)sp & ~63ull);
        *--sp = nullptr;
        *--sp = (void*)thread_main;
        for (int k = 0; k < 6; k++) *--sp = nullptr;
        t.stack_pointer = sp;
    }
}

// Nothing can run: either exited threads hold up a barrier, or it is a deadlock.
static bool resolve_stall(Block& b) {
    Thread* waiting = nullptr;
    u32 at_barrier = 0, in_warp_op = 0;
    for (Thread& t : b.threads) {
        if (t.state == AT_BARRIER || t.state == AT_WARP_OP)
            if (!waiting) waiting = &t;
        at_barrier += t.state == AT_BARRIER, in_warp_op += t.state == AT_WARP_OP;
    }
    if (!waiting) return false;
    Barrier& barrier = b.barriers[waiting->barrier & 15];
    bool only_exits = at_barrier + b.exited == b.threads_count && barrier.arrived == at_barrier &&
                      barrier.expected == b.threads_count;
    if (only_exits && (b.ignore & IGNORE_EXITED_BARRIER)) return release_barrier(b, waiting->barrier), true;
    u32 other_line = 0;
    for (Thread& t : b.threads)
        if (t.state != EXITED && t.state != RUNNABLE && t.wait_line != waiting->wait_line) other_line = t.wait_line;
    Launch& launch = *b.launch;
    std::lock_guard<std::mutex> guard(launch.mutex);
    if (!launch.fault.kind) {
        Fault& fault = launch.fault;
        fault.kind = only_exits ? FAULT_DIVERGENT_BARRIER : in_warp_op ? FAULT_DIVERGENT_WARP : FAULT_DEADLOCK;
        if (fault.kind == FAULT_DEADLOCK && other_line) fault.kind = FAULT_DIVERGENT_BARRIER;
        fault.line = waiting->wait_line;
        memcpy(fault.block, b.id, sizeof fault.block);
        memcpy(fault.thread, waiting->tid, sizeof fault.thread);
        int n = snprintf(
            fault.text, sizeof fault.text,
            "no thread can continue: %u wait at a barrier, %u in a warp-wide instruction, %u of %u have exited",
            at_barrier, in_warp_op, b.exited, b.threads_count);
        if (other_line) snprintf(fault.text + n, sizeof fault.text - n, "; others wait at PTX line %u", other_line);
    }
    launch.stop = true;
    return false;
}

static void run_block(Block& b) {
    prepare_threads(b);
    const bool reverse = b.launch->desc->reverse_lanes;
    while (b.exited < b.threads_count) {
        bool progress = false;
        for (u32 k = 0; k < b.warps_count; k++) {
            Warp& warp = b.warps[reverse ? b.warps_count - 1 - k : k];
            warp.spinning = 0;
            u32 pass;
            while (!warp.spinning && (pass = warp.runnable)) {
                progress = true;
                while (pass) {
                    u32 lane = reverse ? 31 - __builtin_clz(pass) : __builtin_ctz(pass);
                    pass &= ~(1u << lane);
                    if (!(warp.runnable >> lane & 1)) continue;
                    entering = warp.threads[lane];
                    ptxcpu_switch(&b.scheduler, entering->stack_pointer);
                    if (__builtin_expect(b.launch->stop, 0)) return;
                }
            }
        }
        if (!progress && !resolve_stall(b)) return;
    }
}
