// How the rows about change tracking are measured.

package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// nearly16TiB is the size of a large device.
const nearly16TiB = 16*tiB - 64*kiB

// goBench measures what a Go benchmark of package cbt says in a unit of its own,
// multiplied by scale.
func goBench(name, unit, time string, scale float64) func(*bench) (float64, error) {
	return func(b *bench) (float64, error) {
		pattern := "^" + strings.ReplaceAll(name, "/", "$/^") + "$"
		out, err := output(exec.CommandContext(b.ctx, "go", "test", "-run", "^$", "-bench", pattern, "-benchtime", time, "blksnap/cbt"))
		if err != nil {
			return 0, err
		}
		v, err := benchmarked(out, unit)
		return v * scale, err
	}
}

// benchmarked finds the value in a unit in what go test printed of one benchmark.
func benchmarked(out []byte, unit string) (float64, error) {
	for line := range strings.Lines(string(out)) {
		fields := strings.Fields(line)
		if len(fields) == 0 || !strings.HasPrefix(fields[0], "Benchmark") {
			continue
		}
		for i := 2; i+1 < len(fields); i += 2 {
			if fields[i+1] == unit {
				return strconv.ParseFloat(fields[i], 64)
			}
		}
	}
	return 0, fmt.Errorf("go test printed no %s: %q", unit, out)
}

// marks are Mark's benchmarks on three sizes of device.
func marks(how, unit string) []subject {
	return []subject{
		{"10 GiB", goBench("BenchmarkMark/10GiB/"+how, unit, "300ms", 1)},
		{"1 TiB", goBench("BenchmarkMark/1TiB/"+how, unit, "300ms", 1)},
		{"16 TiB", goBench("BenchmarkMark/16TiB/"+how, unit, "300ms", 1)},
	}
}

// withoutState starts blksnap where no record of writes and no map can be kept for
// the time after a loss of power: a file is in the way.
func (b *bench) withoutState(origin string) (*server, error) {
	return b.blksnapWith(origin, func(s *server) error {
		if err := os.MkdirAll(s.dir+"/state/devices", 0o700); err != nil {
			return err
		}
		return os.WriteFile(s.dir+"/state/devices/vda", nil, 0o600)
	})
}

// withAndWithoutState measures a load with and without what outlives the machine.
func withAndWithoutState(l load) []subject {
	return []subject{
		{"with", on((*bench).blksnapOn, l.put)},
		{"without", on((*bench).withoutState, l.put)},
	}
}

// recorded is the rate of random writes over 1 TiB, after before, if it is not nil.
func recorded(before *load) func(*bench) (float64, error) {
	return onSparse(tiB, func(s *server, _ string) (float64, error) {
		if before != nil {
			if _, err := before.put(s); err != nil {
				return 0, err
			}
		}
		return anywhere4k32.put(s)
	})
}

// change makes runs out of a hundredth of a device of size bytes count as changed,
// each with 4 KiB that were written and a hole after it.
func (s *server) change(size int64, runs int) error {
	each := size / int64(runs) &^ (64*kiB - 1)
	writes := load{rw: fmt.Sprint("write:", each-4*kiB), block: 4 * kiB, depth: 1, size: size, total: int64(runs) * 4 * kiB}
	if _, err := writes.put(s); err != nil {
		return err
	}
	args := []string{"cbt", "mark", "vda"}
	for i := range int64(runs) {
		args = append(args, fmt.Sprintf("--range=%d:%d", i*each, each/100))
	}
	_, err := output(s.command(args...))
	return err
}

// increment is how many milliseconds it takes to open and read the list of what
// changed between two snapshots of a large device: a hundredth, in 1,000 runs.
func increment(s *server, _ string) (float64, error) {
	const runs = 1000
	snapshots := s.dir + "/tree/snapshots/"
	if err := s.snapshots(1); err != nil {
		return 0, err
	}
	if err := s.change(nearly16TiB, runs); err != nil {
		return 0, err
	}
	if err := os.Mkdir(snapshots+"after", 0o755); err != nil {
		return 0, err
	}
	number, err := os.ReadFile(snapshots + "s0/vda.cbt/number")
	if err != nil {
		return 0, err
	}
	begun := time.Now()
	text, err := os.ReadFile(snapshots + "after/vda.cbt/since/" + strings.TrimSpace(string(number)))
	took := time.Since(begun)
	if lines := bytes.Count(text, []byte("\n")); err == nil && lines < runs {
		err = fmt.Errorf("%d lines for %d runs", lines, runs)
	}
	return millisOf(took), err
}

// restart is how many milliseconds after it was killed and started again blksnap
// answers a read of a large device, a hundredth of which changed in 1,000 runs, and
// 100,000 chunks of which were preserved.
func restart(s *server, origin string) (float64, error) {
	if err := s.change(nearly16TiB, 1000); err != nil {
		return 0, err
	}
	if err := s.snapshots(1); err != nil {
		return 0, err
	}
	writes := anywhere4k32
	writes.size, writes.total = nearly16TiB, 100_000*4*kiB
	if _, err := writes.put(s); err != nil {
		return 0, err
	}
	if err := s.cmd.Process.Kill(); err != nil {
		return 0, err
	}
	s.cmd.Wait() // with the signal's status

	begun := time.Now()
	cmd, err := s.start(s.serve(origin))
	if err != nil {
		return 0, err
	}
	s.cmd = cmd
	var answer error
	err = waitFor("an answer", func() bool {
		answer = read512(s.socket, s.live)
		return answer == nil
	})
	if err != nil {
		return 0, fmt.Errorf("%w: %w: %s", err, answer, &s.said)
	}
	took := time.Since(begun)
	_, err = s.when("the snapshot is back", s.imageFile(), nearly16TiB)
	return millisOf(took), err
}

// read512 reads the first 512 bytes of an export, as a client does that has just
// come.
func read512(socket, export string) error {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	be := binary.BigEndian
	p := be.AppendUint32(nil, 1<<0|1<<1) // fixed newstyle, no zeroes
	p = append(p, "IHAVEOPT"...)
	p = be.AppendUint32(p, 1) // NBD_OPT_EXPORT_NAME
	p = be.AppendUint32(p, uint32(len(export)))
	p = append(p, export...)
	p = be.AppendUint32(p, 0x25609513) // a request: read
	p = append(p, make([]byte, 2+2+8+8)...)
	p = be.AppendUint32(p, 512)
	if _, err := conn.Write(p); err != nil {
		return err
	}
	// Greeting, size and flags, header of the reply, data.
	answer := make([]byte, 18+10+16+512)
	if _, err := io.ReadFull(conn, answer); err != nil {
		return err
	}
	if e := be.Uint32(answer[18+10+4:]); e != 0 {
		return fmt.Errorf("read: error %d", e)
	}
	return nil
}

func millisOf(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e6 }
