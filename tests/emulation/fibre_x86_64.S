// The switch between two stacks, and a fibre's first instructions (fibre.h). System V ABI.
#if defined(__x86_64__)
    .text

// void emulation_switch(void** save_stack_pointer /* rdi */, void* new_stack_pointer /* rsi */)
    .globl  emulation_switch
    .hidden emulation_switch
    .type   emulation_switch, @function
emulation_switch:
    pushq   %rbp
    pushq   %rbx
    pushq   %r12
    pushq   %r13
    pushq   %r14
    pushq   %r15
    movq    %rsp, (%rdi)
    movq    %rsi, %rsp
    popq    %r15
    popq    %r14
    popq    %r13
    popq    %r12
    popq    %rbx
    popq    %rbp
    ret
    .size   emulation_switch, .-emulation_switch

// Fibre::start() left the entry in rbx and its argument in r12. The frame ends the unwinder's walk.
    .globl  emulation_begin
    .hidden emulation_begin
    .type   emulation_begin, @function
emulation_begin:
    .cfi_startproc
    .cfi_undefined rip
    movq    %r12, %rdi
    callq   *%rbx
    ud2
    .cfi_endproc
    .size   emulation_begin, .-emulation_begin
#endif
    .section .note.GNU-stack, "", @progbits
