// How single rows are measured, where a load alone does not do it.

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"
)

// start starts a server of an origin.
type start = func(b *bench, origin string) (*server, error)

// on measures do on a server that is started for it, over an origin in the
// page cache, and stopped afterwards.
func on(begin start, do func(*server) (float64, error)) func(*bench) (float64, error) {
	return func(b *bench) (value float64, err error) {
		if err := warm(b.origin); err != nil {
			return 0, err
		}
		s, err := begin(b, b.origin)
		if err != nil {
			return 0, err
		}
		defer func() { err = errors.Join(err, s.stop()) }()
		return do(s)
	}
}

// inTurns measures a load on two servers, each over an origin of its own, that are
// both there after before was put on them and what that left in memory is on the
// disk. They have short turns at it, so that a machine that is slower for some
// seconds is so for both.
func inTurns(name1 string, start1 start, name2 string, start2 start, before, l load) []subject {
	var second float64
	return []subject{
		{name1, func(b *bench) (float64, error) {
			other := filepath.Join(b.work, "other")
			defer os.Remove(other)
			if err := makeRandom(other, b.size); err != nil {
				return 0, err
			}
			return on(start1, func(s1 *server) (first float64, err error) {
				s2, err := start2(b, other)
				if err != nil {
					return 0, err
				}
				defer func() { err = errors.Join(err, s2.stop()) }()
				first, second, err = turns(s1, s2, before, l)
				return first, err
			})(b)
		}},
		{name2, func(*bench) (float64, error) { return second, nil }},
	}
}

// turns are the mean rates of two servers in turns at l, of which the first is not
// counted.
func turns(s1, s2 *server, before, l load) (rate1, rate2 float64, err error) {
	for _, s := range []*server{s1, s2} {
		if _, err := before.put(s); err != nil {
			return 0, 0, err
		}
	}
	if err := syncFiles(s1.b.work); err != nil {
		return 0, 0, err
	}
	const n = 8
	l.short = true
	for i := range n + 1 {
		r1, err1 := l.put(s1)
		r2, err2 := l.put(s2)
		if err := errors.Join(err1, err2); err != nil {
			return 0, 0, err
		}
		if i > 0 {
			rate1, rate2 = rate1+r1/n, rate2+r2/n
		}
	}
	return rate1, rate2, nil
}

// snapshotted starts blksnap with n snapshots of the origin open.
func snapshotted(n int) start {
	return func(b *bench, origin string) (*server, error) {
		s, err := b.blksnapOn(origin)
		if err != nil {
			return nil, err
		}
		if err := s.snapshots(n); err != nil {
			return nil, errors.Join(err, s.stop())
		}
		return s, nil
	}
}

// during does something while a load is put on a server, and fails if the load
// ends before.
func during(s *server, l load, do func() (float64, error)) (value float64, err error) {
	fio := l.command(s.b, s.uri(s.live))
	fio.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := fio.Start(); err != nil {
		return 0, err
	}
	ended := make(chan error, 1)
	go func() { ended <- fio.Wait() }()

	value, err = do()
	select {
	case early := <-ended:
		return 0, errors.Join(err, fmt.Errorf("the writes ended too early: %w", early))
	default:
	}
	fio.Process.Signal(syscall.SIGTERM)
	<-ended // with the signal's status
	return value, err
}

// readsDuringWrites is the rate of reads while 5,000 blocks a second are
// written, none of them twice.
func readsDuringWrites(s *server) (float64, error) {
	writes := load{rw: "randwrite", block: 4 * kiB, depth: 8, iops: 5000, total: s.b.size}
	return during(s, writes, func() (float64, error) { return read4k32.put(s) })
}

// pauses measures how long writes were held up by taking snapshots of origins
// of three sizes, as the q-quantile of 50.
func pauses(q float64) (subjects []subject) {
	for _, o := range []struct {
		name string
		size int64
	}{
		{"1 TiB", tiB},
		{"4 TiB", 4 * tiB},
		{"16 TiB less 64 KiB", nearly16TiB},
	} {
		subjects = append(subjects, subject{o.name, onSparse(o.size, func(s *server, _ string) (float64, error) {
			return pause(s, q)
		})})
	}
	return subjects
}

func pause(s *server, q float64) (float64, error) {
	const taken = 50
	writes := load{rw: "randwrite", block: 4 * kiB, depth: 16, iops: 20000, forever: true}
	return during(s, writes, func() (float64, error) {
		var held []float64
		for range taken {
			ns, err := s.heldUp()
			if err != nil {
				return 0, err
			}
			held = append(held, ns/1000)
		}
		slices.Sort(held)
		return held[int(q*(taken-1)+0.5)], nil
	})
}

// heldUp takes a snapshot and destroys it, and returns how long writes waited
// for it, in nanoseconds.
func (s *server) heldUp() (float64, error) {
	path := s.dir + "/tree/snapshots/pause"
	if err := os.Mkdir(path, 0o755); err != nil {
		return 0, err
	}
	out, err := output(s.command("snapshot", "show", "pause", "--json"))
	if err != nil {
		return 0, err
	}
	var shown struct {
		HeldUp float64 `json:"held_up_ns"`
	}
	if err := json.Unmarshal(out, &shown); err != nil {
		return 0, err
	}
	return shown.HeldUp, syscall.Rmdir(path)
}

// onSparse measures do on blksnap over an origin of many TiB that is a hole.
func onSparse(size int64, do func(s *server, origin string) (float64, error)) func(*bench) (float64, error) {
	return func(b *bench) (value float64, err error) {
		dir, err := os.MkdirTemp(b.sparse, "blksnap-bench-")
		if err != nil {
			return 0, err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
		origin := filepath.Join(dir, "sparse")
		if err := makeSparse(origin, size); err != nil {
			return 0, err
		}
		s, err := b.blksnapOn(origin)
		if err != nil {
			return 0, err
		}
		defer func() { err = errors.Join(err, s.stop()) }()
		return do(s, origin)
	}
}

// anonymous is how much anonymous memory blksnap has after first writes to an
// origin of nearly 16 TiB with a snapshot open.
func anonymous(l load) func(*bench) (float64, error) {
	if l.anywhere {
		l.size = nearly16TiB
	}
	return onSparse(nearly16TiB, func(s *server, _ string) (float64, error) {
		if err := s.snapshots(1); err != nil {
			return 0, err
		}
		if _, err := l.put(s); err != nil {
			return 0, err
		}
		return s.status("RssAnon")
	})
}
