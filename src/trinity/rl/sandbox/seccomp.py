"""The filter of system calls: a list of what programs may ask of the kernel, as a BPF program.

Numbers are those of the kernel's headers (asm/unistd_64.h, asm-generic/unistd.h), instructions those of
linux/bpf_common.h and linux/seccomp.h.
"""

import struct

# Machine -> (AUDIT_ARCH of linux/audit.h, column of the table)
ARCHITECTURES = {"x86_64": (0xC000003E, 1), "aarch64": (0xC00000B7, 2)}

# name:x86_64:aarch64. Left out are, among others, whatever makes namespaces or mounts, traces or reads other processes,
# holds memory that no limit counts (memfd, System V and POSIX queues), keyrings, bpf, perf, io_uring and splicing.
_TABLE = """
    fgetxattr:193:10 flistxattr:196:13 getxattr:191:8 lgetxattr:192:9 listxattr:194:11 llistxattr:195:12
    accept:43:202 accept4:288:242 access:21:- alarm:37:- arch_prctl:158:- bind:49:200 brk:12:214 capget:125:90
    chdir:80:49 chmod:90:- chown:92:- clock_getres:229:114 clock_gettime:228:113 clock_nanosleep:230:115
    clone:56:220 clone3:435:435 close:3:57 close_range:436:436 connect:42:203 copy_file_range:326:285 creat:85:-
    dup:32:23 dup2:33:- dup3:292:24 epoll_create:213:- epoll_create1:291:20 epoll_ctl:233:21 epoll_pwait:281:22
    epoll_pwait2:441:441 epoll_wait:232:- eventfd:284:- eventfd2:290:19 execve:59:221 execveat:322:281 exit:60:93
    exit_group:231:94 faccessat:269:48 faccessat2:439:439 fadvise64:221:223 fallocate:285:47 fchdir:81:50
    fchmod:91:52 fchmodat:268:53 fchown:93:55 fchownat:260:54 fcntl:72:25 fdatasync:75:83 flock:73:32 fork:57:-
    fstat:5:80 fstatfs:138:44 fsync:74:82 ftruncate:77:46 futex:202:98 futex_waitv:449:449 get_robust_list:274:100
    getcpu:309:168 getcwd:79:17 getdents:78:- getdents64:217:61 getegid:108:177 geteuid:107:175 getgid:104:176
    getgroups:115:158 getitimer:36:102 getpeername:52:205 getpgid:121:155 getpgrp:111:- getpid:39:172
    getppid:110:173 getpriority:140:141 getrandom:318:278 getresgid:120:150 getresuid:118:148 getrlimit:97:163
    getrusage:98:165 getsid:124:156 getsockname:51:204 getsockopt:55:209 gettid:186:178 gettimeofday:96:169
    getuid:102:174 ioctl:16:29 kill:62:129 lchown:94:- link:86:- linkat:265:37 listen:50:201 lseek:8:62 lstat:6:-
    madvise:28:233 membarrier:324:283 mincore:27:232 mkdir:83:- mkdirat:258:34 mknod:133:- mknodat:259:33 mmap:9:222
    mprotect:10:226 mremap:25:216 msync:26:227 munmap:11:215 nanosleep:35:101 newfstatat:262:79 open:2:-
    openat:257:56 openat2:437:437 pause:34:- pipe:22:- pipe2:293:59 poll:7:- ppoll:271:73 prctl:157:167
    pread64:17:67 preadv:295:69 preadv2:327:286 prlimit64:302:261 pselect6:270:72 pwrite64:18:68 pwritev:296:70
    pwritev2:328:287 read:0:63 readahead:187:213 readlink:89:- readlinkat:267:78 readv:19:65 recvfrom:45:207
    recvmmsg:299:243 recvmsg:47:212 rename:82:- renameat:264:38 renameat2:316:276 restart_syscall:219:128 rmdir:84:-
    rseq:334:293 rt_sigaction:13:134 rt_sigpending:127:136 rt_sigprocmask:14:135 rt_sigqueueinfo:129:138
    rt_sigreturn:15:139 rt_sigsuspend:130:133 rt_sigtimedwait:128:137 rt_tgsigqueueinfo:297:240
    sched_get_priority_max:146:125 sched_get_priority_min:147:126 sched_getaffinity:204:123 sched_getattr:315:275
    sched_getparam:143:121 sched_getscheduler:145:120 sched_rr_get_interval:148:127 sched_yield:24:124 select:23:-
    sendfile:40:71 sendmmsg:307:269 sendmsg:46:211 sendto:44:206 set_robust_list:273:99 set_tid_address:218:96
    setitimer:38:103 setpgid:109:154 setrlimit:160:164 setsid:112:157 setsockopt:54:208 shutdown:48:210
    sigaltstack:131:132 signalfd:282:- signalfd4:289:74 socket:41:198 socketpair:53:199 stat:4:- statfs:137:43
    statx:332:291 symlink:88:- symlinkat:266:36 sync_file_range:277:84 sysinfo:99:179 tgkill:234:131 time:201:-
    timer_create:222:107 timer_delete:226:111 timer_getoverrun:225:109 timer_gettime:224:108 timer_settime:223:110
    timerfd_create:283:85 timerfd_gettime:287:87 timerfd_settime:286:86 times:100:153 tkill:200:130 truncate:76:45
    umask:95:166 uname:63:160 unlink:87:- unlinkat:263:35 utime:132:- utimensat:280:88 utimes:235:- vfork:58:-
    wait4:61:260 waitid:247:95 write:1:64 writev:20:66
"""

CHECKED = ("clone", "clone3", "ioctl", "prctl", "prlimit64", "setsockopt", "socket", "socketpair")
"""Allowed for some arguments only."""
_NEW_NAMESPACES = 0x7E020080  # CLONE_NEW* of linux/sched.h, CLONE_NEWTIME included
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS TIOCGWINSZ FIONREAD FIONBIO FIONCLEX FIOCLEX
_PRCTLS = (1, 3, 15, 16, 21, 23, 39, 0x53564D41)
"""PDEATHSIG, GET_DUMPABLE, SET_NAME, GET_NAME, GET_SECCOMP, CAPBSET_READ, GET_NO_NEW_PRIVS, SET_VMA"""
_AF_UNIX = 1
_SOCKET_FILTERS = (26, 50, 51, 52)  # SO_ATTACH_FILTER, SO_ATTACH_BPF, SO_ATTACH_REUSEPORT_CBPF, ..._EBPF
_X32 = 0x40000000
_EPERM, _ENOTTY, _ENOSYS, _EAFNOSUPPORT = 1, 25, 38, 97

_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCH, _ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data


def numbers(machine: str) -> dict[str, int]:
    """The allowed and the checked system calls of a machine by name. Raises KeyError for an unknown machine."""
    column = ARCHITECTURES[machine][1]
    fields = (entry.split(":") for entry in _TABLE.split())
    return {entry[0]: int(entry[column]) for entry in fields if entry[column] != "-"}


def bpf(machine: str) -> bytes:
    """The filter as an array of struct sock_filter. Raises KeyError for an unknown machine."""
    known = numbers(machine)
    program = [
        _step(_LOAD, _ARCH),
        _step(_JUMP_EQUAL, ARCHITECTURES[machine][0], 1, 0),
        _step(_RETURN, _KILL),  # another instruction set has other numbers
        _step(_LOAD, _NUMBER),
        _step(_JUMP_GREATER_EQUAL, _X32, 0, 1),
        _step(_RETURN, _KILL),
    ]
    for name, number in known.items():
        if name not in CHECKED:
            program += [_step(_JUMP_EQUAL, number, 0, 1), _step(_RETURN, _ALLOW)]
    program += _when(known["clone3"], [_refuse(_ENOSYS)])  # its flags are in memory: libraries go on with clone
    program += _when(
        known["clone"],
        [_argument(0), _step(_JUMP_SET, _NEW_NAMESPACES, 0, 1), _refuse(_EPERM), _step(_RETURN, _ALLOW)],
    )
    for name in ("socket", "socketpair"):
        program += _when(known[name], _one_of(0, (_AF_UNIX,), _EAFNOSUPPORT))
    program += _when(known["ioctl"], _one_of(1, _IOCTLS, _ENOTTY))
    program += _when(known["prctl"], _one_of(0, _PRCTLS, _EPERM))
    program += _when(known["prlimit64"], _one_of(0, (0,), _EPERM))  # of the caller itself
    program += _when(known["setsockopt"], _none_of(2, _SOCKET_FILTERS, _EPERM))
    program.append(_refuse(_EPERM))
    return b"".join(program)


def _step(code: int, value: int, when_true: int = 0, when_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, when_true, when_false, value)


def _refuse(errno: int) -> bytes:
    return _step(_RETURN, 0x00050000 | errno)


def _argument(index: int) -> bytes:
    """The lower half of an argument: all checked ones are 32 bits wide."""
    return _step(_LOAD, _ARGUMENT + 8 * index)


def _when(number: int, block: list[bytes]) -> list[bytes]:
    """A block, which must end in a return, for one system call."""
    return [_step(_JUMP_EQUAL, number, 0, len(block)), *block]


def _none_of(argument: int, values: tuple[int, ...], errno: int) -> list[bytes]:
    tests = [_step(_JUMP_EQUAL, value, len(values) - i, 0) for i, value in enumerate(values)]
    return [_argument(argument), *tests, _step(_RETURN, _ALLOW), _refuse(errno)]


def _one_of(argument: int, values: tuple[int, ...], errno: int) -> list[bytes]:
    tests = [_step(_JUMP_EQUAL, value, len(values) - i, 0) for i, value in enumerate(values)]
    return [_argument(argument), *tests, _refuse(errno), _step(_RETURN, _ALLOW)]
