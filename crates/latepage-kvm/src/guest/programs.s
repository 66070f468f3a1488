# The guest: everything that ever runs inside the reference VMM.
#
# Position-independent 64-bit code, copied to one place in guest memory (layout.rs, CODE). There is no stack, no interrupt
# and no mailbox: arguments come in registers (docs/vm.md has the table, guest/registers.rs sets them), results leave by `out`.
# Every program is a loop whose whole state is in registers, so that a VM may be paused, saved and restored at any instruction.
#
#   rsi  fingerprint pages below the hole in guest-physical memory     rdx  bytes to skip for the pages above it
#   rbx  pages done so far                                             r14  seed of the words (odd; 0 means zero words)
#   r8   place in the order; r9, r10, r11, cl  the order's multiplier, increment, mask and shift
#   r12  pages of this vCPU's slice; r13  steps left; r15  first page of the slice
#   rsp  (verify_mixed, verify_list) table of one byte a page, naming its seed in the table of seeds one page before
#   in the list programs: r8  next entry, r9  address of the slice's entries (u32), r12  number of entries
#   scratch: rax (page number, then the mixed value), rbp, rdi (the page's address: the host reads it with WRONG)

    .set PORT_HELLO,    0xE0
    .set PORT_PROGRESS, 0xE1
    .set PORT_WRONG,    0xE2
    .set PORT_DONE,     0xE3
    .set PORT_SAID,     0xE4
    .set K_FIRST,       0x2545F491
    .set K_NEXT,        0x7FEB352D

# The next page in the order, to rax: a full-period generator modulo a power of two, whose low bits are stirred by a
# bijective xorshift; what lies past the slice is skipped (fewer than half of the steps). To 9f when the steps are over.
    .macro next_in_order
2:  test r13, r13
    jz 9f
    dec r13
    mov rax, r8
    shr rax, cl
    xor rax, r8
    imul r8, r9
    add r8, r10
    and r8, r11
    cmp rax, r12
    jae 2b
    add rax, r15
    .endm

# The next page of the list, to rax. To 9f at its end.
    .macro next_in_list
2:  cmp r8, r12
    jae 9f
    mov eax, dword ptr [r9 + r8*4]
    inc r8
    .endm

# rdi = guest address of page rax: pages are numbered from 2 MiB upward, and the hole is not counted.
    .macro page_address
    mov rdi, rax
    shl rdi, 12
    cmp rax, rsi
    jb 3f
    add rdi, rdx
3:  add rdi, 0x200000
    .endm

# The seed that page rax should have, to r14.
    .macro seed_of_page
    movzx r14d, byte ptr [rsp + rax]
    mov r14, qword ptr [rsp + r14*8 - 4096]
    .endm

# rax = the first word of page rax. Each step maps zero to zero alone: seed 0 makes zero words, any other none.
    .macro first_word
    inc rax
    imul rax, r14
    mov rbp, rax
    shr rbp, 32
    xor rax, rbp
    imul rax, rax, K_FIRST
    .endm

# rax = the next word; rbp = where in its band of 85 words it lies (its upper six bits).
    .macro next_word
    imul rax, rax, K_NEXT
    mov rbp, rax
    shr rbp, 58
    .endm

    .macro write_page
    first_word
    mov qword ptr [rdi], rax
    .irp band, 0, 1, 2, 3, 4, 5
    next_word
    mov qword ptr [rdi + rbp*8 + (1 + 85*\band)*8], rax
    .endr
    imul rax, rax, K_NEXT
    mov qword ptr [rdi + 4088], rax
    .endm

# To 7: at the first word that differs.
    .macro check_page
    first_word
    cmp qword ptr [rdi], rax
    jne 7f
    .irp band, 0, 1, 2, 3, 4, 5
    next_word
    cmp qword ptr [rdi + rbp*8 + (1 + 85*\band)*8], rax
    jne 7f
    .endr
    imul rax, rax, K_NEXT
    cmp qword ptr [rdi + 4088], rax
    je 8f
7:  out PORT_WRONG, al
8:
    .endm

# Puts out the first byte of page rdi by a string instruction, which has KVM itself read it. That takes rsi and rdx.
    .macro say_page
    mov rax, rsi
    mov rbp, rdx
    mov rsi, rdi
    mov edx, PORT_SAID
    outsb
    mov rsi, rax
    mov rdx, rbp
    .endm

# Counts the page, tells the host every 256 pages, goes round; 9: is the end of every program.
    .macro counted_then_next
    inc rbx
    test bl, bl
    jnz 4f
    out PORT_PROGRESS, al
4:  jmp 2b
9:  out PORT_DONE, al
5:  hlt
    jmp 5b
    .endm

    .pushsection .rodata.latepage_guest, "a"
    .balign 16
    .globl latepage_guest_start
    .globl latepage_guest_end
latepage_guest_start:
# Where each program starts, in the order of guest::Program.
    .long .Lhello - latepage_guest_start
    .long .Lfill - latepage_guest_start
    .long .Lfill_list - latepage_guest_start
    .long .Lverify - latepage_guest_start
    .long .Lverify_mixed - latepage_guest_start
    .long .Lverify_list - latepage_guest_start
    .long .Ltouch - latepage_guest_start
    .long .Ltouch_list - latepage_guest_start
    .long .Lsay - latepage_guest_start
    .long .Lsay_list - latepage_guest_start
    .long .Lcount - latepage_guest_start

# The first sign of life.
    .balign 16
.Lhello:
    out PORT_HELLO, al
5:  hlt
    jmp 5b

# Writes the fingerprint of r14 to every page of the slice.
    .balign 16
.Lfill:
    next_in_order
    page_address
    write_page
    counted_then_next

    .balign 16
.Lfill_list:
    next_in_list
    page_address
    write_page
    counted_then_next

# Checks every page of the slice against the fingerprint of r14.
    .balign 16
.Lverify:
    next_in_order
    page_address
    check_page
    counted_then_next

# The same where pages differ in their seeds.
    .balign 16
.Lverify_mixed:
    next_in_order
    page_address
    seed_of_page
    check_page
    counted_then_next

    .balign 16
.Lverify_list:
    next_in_list
    page_address
    seed_of_page
    check_page
    counted_then_next

# Reads one word of every page.
    .balign 16
.Ltouch:
    next_in_order
    page_address
    mov rax, qword ptr [rdi]
    counted_then_next

    .balign 16
.Ltouch_list:
    next_in_list
    page_address
    mov rax, qword ptr [rdi]
    counted_then_next

# Has KVM read a byte of every page.
    .balign 16
.Lsay:
    next_in_order
    page_address
    say_page
    counted_then_next

    .balign 16
.Lsay_list:
    next_in_list
    page_address
    say_page
    counted_then_next

# Counts for ever in rbx, and says so every 65,536.
    .balign 16
.Lcount:
    inc rbx
    test bx, bx
    jnz .Lcount
    out PORT_PROGRESS, al
    jmp .Lcount

latepage_guest_end:
    .popsection
