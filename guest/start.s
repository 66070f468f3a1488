# Entry, and what the CPU calls when it is interrupted.
#
# Firecracker starts a 64-bit guest by Linux's boot protocol: long mode, the first 1 GiB mapped to itself, rsi = the zero page.

    .section .text.start, "ax"
    .global _start
_start:
    cld
    lea stack_end(%rip), %rsp
    mov %rsi, %rdi
    call guest
1:  hlt
    jmp 1b

# An interrupt does nothing but end a `hlt`: the main loop looks at every device when it wakes. Both controllers are told,
# whichever it was.
    .text
    .global interrupt
interrupt:
    push %rax
    mov $0x20, %al
    out %al, $0xa0
    out %al, $0x20
    pop %rax
    iretq

# An exception tells what it was and ends the VM: exception(vector, error code, rip).
    .altmacro
    .macro exception_entry vector
    .balign 16
    # The CPU pushes an error code for these only.
    .if (\vector < 32) && !((0x60227d00 >> \vector) & 1)
    push $0
    .endif
    mov $\vector, %edi
    jmp exception_entered
    .endm

    .global exceptions
    .balign 16
exceptions:
    .set vector, 0
    .rept 32
    exception_entry %vector
    .set vector, vector + 1
    .endr

exception_entered:
    pop %rsi
    mov (%rsp), %rdx
    and $-16, %rsp
    call exception

    .bss
    .balign 16
    .space 16384
stack_end:

    .section .note.GNU-stack, "", @progbits
