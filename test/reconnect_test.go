// NBD clients that reconnect, over the death of the daemon.

package test

import (
	"fmt"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// qemuDisk starts QEMU's storage daemon with an export as its disk, as a
// virtual machine has it, for at most two minutes without a server. It returns
// the socket on which the disk is served again, under the export's name.
func qemuDisk(t *testing.T, d *daemon, export string) (socket string) {
	t.Helper()
	need(t, "qemu-storage-daemon")
	socket = filepath.Join(d.dir, "qemu.sock")
	said := &log{}
	cmd := exec.Command("qemu-storage-daemon",
		"--blockdev", "driver=nbd,node-name=disk,server.type=unix,server.path="+d.socket()+",export="+export+",reconnect-delay=120",
		"--nbd-server", "addr.type=unix,max-connections=0,addr.path="+socket,
		"--export", "type=nbd,id=disk,node-name=disk,writable=on,name="+export)
	cmd.Stdout, cmd.Stderr = said, said
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("what QEMU wrote:\n%s", said)
		}
	})
	eventually(t, "QEMU serves its disk", func() bool { return exists(socket) })
	return socket
}

// diskWriter is a program in a virtual machine: it writes to a part of a disk
// of its own, one request at a time, and knows what must be there.
type diskWriter struct {
	*nbdConn
	off, n int64            // its part
	passes map[int64]uint64 // sector -> the pass in which it was written
}

// write writes at random until stop is closed, and counts its writes.
func (w *diskWriter) write(rng *rand.Rand, count *atomic.Int64, stop <-chan struct{}) error {
	p := make([]byte, 64*kiB)
	for pass := uint64(2); ; pass++ {
		select {
		case <-stop:
			return nil
		default:
		}
		off, n := randomRange(rng, w.n, int64(len(p)))
		off += w.off
		Stamp(p[:n], "vda", off, pass)
		if err := w.writeAt(p[:n], off); err != nil {
			return fmt.Errorf("write %d bytes at %d in pass %d: %w", n, off, pass, err)
		}
		if pass%16 == 0 {
			if err := w.flush(); err != nil {
				return fmt.Errorf("flush in pass %d: %w", pass, err)
			}
		}
		for s := off; s < off+n; s += SectorSize {
			w.passes[s] = pass
		}
		count.Add(1)
	}
}

// A machine on QEMU does not notice that the daemon is killed and started
// again while it writes: no request fails, and nothing that was acknowledged
// is lost. Snapshot and history go on.
func TestQEMUReconnects(t *testing.T) {
	needRoot(t)
	needLibnbd(t)
	const size, writers = 32 * miB, 4
	t.Logf("repeat with -seed=%d", *seed)
	d, origin := serveOrigin(t, size)
	mkdir(t, d.snapshot("before"))
	before := filepath.Join(d.dir, "before")
	run(t, "cp", d.snapshot("before", "vda.img"), before)
	generation := read(t, d.device("vda", "cbt", "generation"))
	number := readNumber(t, d.snapshot("before", "vda.cbt", "number"))
	socket := qemuDisk(t, d, "vda")

	var (
		count  atomic.Int64
		all    []*diskWriter
		stop   = make(chan struct{})
		wrote  = make(chan error, writers)
		joined sync.WaitGroup
	)
	for i := range int64(writers) {
		w := &diskWriter{&nbdConn{Conn: dial(t, socket)}, i * size / writers, size / writers, map[int64]uint64{}}
		if err := w.handshake("vda"); err != nil {
			t.Fatalf("open QEMU's disk: %v", err)
		}
		w.SetDeadline(time.Now().Add(3 * patience))
		all = append(all, w)
		rng := rand.New(rand.NewPCG(uint64(*seed), uint64(i)))
		joined.Go(func() { wrote <- w.write(rng, &count, stop) })
	}
	progress := func() {
		t.Helper()
		target := count.Load() + 100
		eventually(t, "the machine goes on", func() bool { return count.Load() >= target || len(wrote) > 0 })
	}
	progress()
	for range 3 {
		d.kill()
		d.start(origin)
		progress()
	}
	close(stop)
	joined.Wait()
	for range writers {
		if err := <-wrote; err != nil {
			t.Error(err)
		}
	}
	t.Logf("%d writes", count.Load())

	content := make([]byte, size)
	if err := d.open("vda").readAt(content, 0); err != nil {
		t.Fatal(err)
	}
	for _, w := range all {
		for off, pass := range w.passes {
			if err := Verify(content[off:off+SectorSize], "vda", off, pass, pass); err != nil {
				t.Fatal(err)
			}
		}
	}
	run(t, "cmp", before, d.snapshot("before", "vda.img"))
	if got := read(t, d.device("vda", "cbt", "generation")); got != generation {
		t.Errorf("generation\n got %s\nwant %s", got, generation)
	}

	// The increment since the snapshot is all that was written.
	increment(t, d, "vda", number, before)
	run(t, "cmp", before, origin)
}
