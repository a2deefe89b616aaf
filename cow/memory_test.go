package cow

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

func openMemory(t *testing.T, max int64) *memory {
	t.Helper()
	m, err := newMemory(max)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Errorf("close memory: %v", err)
		}
	})
	return m
}

func grow(t *testing.T, m *memory, n int64) {
	t.Helper()
	if err := m.Grow(n); err != nil {
		t.Fatal(err)
	}
}

// resident says of each page of b whether it takes memory; the error is ENOMEM
// where addresses are not in use.
func resident(b []byte) ([]bool, error) {
	pages := make([]byte, len(b)/os.Getpagesize())
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), uintptr(unsafe.Pointer(&pages[0])))
	if errno != 0 {
		return nil, errno
	}
	in := make([]bool, len(pages))
	for k, p := range pages {
		in[k] = p&1 != 0
	}
	return in, nil
}

func TestMemoryGrowsInPlace(t *testing.T) {
	m := openMemory(t, 10*memoryStep-1)
	if got := len(m.Bytes()); got != 10*memoryStep {
		t.Errorf("reserved: got %d bytes, want %d", got, 10*memoryStep)
	}
	first := &m.Bytes()[0]
	if at := uintptr(unsafe.Pointer(first)); at%64 != 0 {
		t.Errorf("memory begins at %x, which is no cache line", at)
	}
	for n, want := range map[int64]int64{1: memoryStep, memoryStep: memoryStep, memoryStep + 1: 2 * memoryStep} {
		before := m.Len()
		grow(t, m, n)
		if got := m.Len() - before; got != want {
			t.Errorf("grow by %d: got %d more bytes, want %d", n, got, want)
		}
		for off := before; off < m.Len(); off++ {
			if b := m.Bytes()[off]; b != 0 {
				t.Fatalf("byte %d is new: got %d, want 0", off, b)
			}
			m.Bytes()[off] = 1
		}
	}
	if &m.Bytes()[0] != first {
		t.Error("memory moved when it grew")
	}
	if k := slices.Index(m.Bytes()[:m.Len()], 0); k >= 0 {
		t.Errorf("byte %d changed when memory grew", k)
	}
}

// TestMemoryIsThereBeforeItIsTouched looks at what is in use as the kernel sees it:
// all of what was grown, though nobody touched it, and none of the rest.
func TestMemoryIsThereBeforeItIsTouched(t *testing.T) {
	m := openMemory(t, 4<<20)
	grow(t, m, 1<<20)
	in, err := resident(m.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	grown := 1 << 20 / os.Getpagesize()
	if k := slices.Index(in[:grown], false); k >= 0 {
		t.Errorf("page %d of %d that were grown takes no memory yet", k, grown)
	}
	if k := slices.Index(in[grown:], true); k >= 0 {
		t.Errorf("page %d beyond those that were grown takes memory", k)
	}
}

func TestMemoryEnds(t *testing.T) {
	m := openMemory(t, 2*memoryStep)
	grow(t, m, memoryStep)
	if err := m.Grow(memoryStep + 1); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("grow beyond what is reserved: got %v, want ENOSPC", err)
	}
	if got := m.Len(); got != memoryStep {
		t.Errorf("after that: got %d bytes, want %d", got, memoryStep)
	}
	grow(t, m, memoryStep)
}

func TestMemoryCannotReserveEverything(t *testing.T) {
	if m, err := newMemory(1 << 62); err == nil {
		m.Close()
		t.Error("half of all addresses were reserved")
	} else if !errors.Is(err, syscall.ENOMEM) {
		t.Errorf("reserve half of all addresses: got %v, want ENOMEM", err)
	}
}

func TestMemoryGoesBack(t *testing.T) {
	m, err := newMemory(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	grow(t, m, 1<<20)
	b := m.Bytes()
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := resident(b); !errors.Is(err, syscall.ENOMEM) {
		t.Errorf("addresses of closed memory: got %v, want ENOMEM", err)
	}
	if err := m.Close(); err != nil {
		t.Errorf("close again: %v", err)
	}
}

// TestMemoryRunsOut has a child process, which may use little memory, grow by much:
// that is an error and no signal, and a little is still to be had.
func TestMemoryRunsOut(t *testing.T) {
	if os.Getenv("COW_TEST_CHILD") == "memory" {
		m := openMemory(t, 1<<30)
		limit := dataUsed(t) + 256<<20
		if err := unix.Setrlimit(unix.RLIMIT_DATA, &unix.Rlimit{Cur: limit, Max: limit}); err != nil {
			t.Fatal(err)
		}
		if err := m.Grow(1 << 30); !errors.Is(err, syscall.ENOMEM) {
			t.Errorf("grow by 1 GiB: got %v, want ENOMEM", err)
		}
		if got := m.Len(); got != 0 {
			t.Errorf("after that: got %d bytes, want 0", got)
		}
		grow(t, m, memoryStep)
		m.Bytes()[memoryStep-1] = 1
		return
	}
	c := exec.Command(os.Args[0], "-test.run=^TestMemoryRunsOut$", "-test.v")
	c.Env = append(os.Environ(), "COW_TEST_CHILD=memory", "GORACE=atexit_sleep_ms=0")
	if out, err := c.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// dataUsed is what the kernel counts against RLIMIT_DATA, in bytes.
func dataUsed(t *testing.T) uint64 {
	t.Helper()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "VmData:")
	var kib uint64
	if _, err := fmt.Sscanf(rest, "%d kB", &kib); err != nil {
		t.Fatalf("VmData in /proc/self/status: %v", err)
	}
	return kib << 10
}

// TestMemoryIsReadWhileItGrows checks that a reader that knows the length of before
// is not disturbed.
func TestMemoryIsReadWhileItGrows(t *testing.T) {
	m := openMemory(t, 64*memoryStep)
	grow(t, m, memoryStep)
	var reader sync.WaitGroup
	reader.Go(func() {
		for n := int64(0); n < 64*memoryStep; n = m.Len() {
			for _, b := range m.Bytes()[max(0, n-memoryStep):n] {
				if b != 0 {
					t.Errorf("new memory: got %d, want 0", b)
					return
				}
			}
		}
	})
	for range 63 {
		grow(t, m, memoryStep)
	}
	reader.Wait()
}

func TestRoundUp(t *testing.T) {
	for _, tc := range []struct{ n, unit, want int64 }{
		{0, 4096, 0}, {1, 4096, 4096}, {4096, 4096, 4096}, {4097, 4096, 8192}, {16<<40 + 1, 512, 16<<40 + 512},
	} {
		if got := roundUp(tc.n, tc.unit); got != tc.want {
			t.Errorf("roundUp(%d, %d): got %d, want %d", tc.n, tc.unit, got, tc.want)
		}
	}
}
