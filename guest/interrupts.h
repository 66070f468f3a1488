/* Interrupts wake the guest, exceptions end it. */
#pragma once

/* From now on a `hlt` ends when a device has something to say. */
void interrupts_begin(void);

/* Ends the VM as a reset by the keyboard controller does: Firecracker exits with 0. */
_Noreturn void end_vm(void);
