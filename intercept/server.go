// The server: listeners, connections, and its end.

package intercept

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Options say how a Server serves. Only Exports must be set.
type Options struct {
	Exports Exports
	Log     *slog.Logger // nil: nothing is logged
	TLS     *tls.Config  // nil: STARTTLS is refused

	// HandshakeTimeout is how long a client may take to choose an export; 0
	// means 30 s.
	HandshakeTimeout time.Duration

	// IdleTimeout is how long a client may send nothing while nothing is in
	// flight; 0 means for ever, as a disk that nobody uses does.
	IdleTimeout time.Duration

	// MaxConns is how many connections may be open; a further one takes the
	// place of the oldest handshake, or is closed at once. 0 means 256.
	MaxConns int

	// MemoryBudget is how many bytes the data of requests and replies may
	// take, of all connections together; 0 means 128 MiB. It is at least 128
	// KiB for each of MaxConns. Beyond it a connection takes 64 KiB to read
	// requests and up to 512 KiB for short replies, buffers take up to a quarter
	// more than they hold, and the kernel's buffer of a unix socket is 2 MiB where
	// we may set it.
	MemoryBudget int64
}

// Server serves exports over NBD. Its methods may be called from any
// goroutine.
type Server struct {
	opts     Options
	budget   *budget
	spares   atomic.Int64 // workers that the connections' pools may still start beyond their own
	stopping atomic.Bool  // Shutdown was called
	looking  atomic.Bool  // a connection's receiver looks for its next request

	// ctx ends when connections are cut off.
	ctx    context.Context
	cancel context.CancelFunc

	// mu protects the fields below. Never held across I/O.
	mu        sync.Mutex
	listeners map[net.Listener]struct{}
	conns     map[*connection]struct{}
	accepted  uint64 // connections so far
	full      bool   // the last connection was refused
}

// NewServer returns a server that serves nobody until Serve is called.
func NewServer(o Options) *Server {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.HandshakeTimeout == 0 {
		o.HandshakeTimeout = 30 * time.Second
	}
	if o.MaxConns == 0 {
		o.MaxConns = 256
	}
	if o.MemoryBudget == 0 {
		o.MemoryBudget = 128 << 20
	}
	s := &Server{
		opts:      o,
		budget:    newBudget(o.MemoryBudget, o.MaxConns),
		listeners: map[net.Listener]struct{}{},
		conns:     map[*connection]struct{}{},
	}
	s.spares.Store(totalSpares)
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// Serve accepts connections from l until ctx ends or Shutdown is called, which
// is no error, or l fails. It closes l. The connections go on after it has
// returned; Shutdown ends them. It may be called for several listeners.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	return s.serve(ctx, l, false)
}

// ServeTLS is Serve for clients that must begin with STARTTLS; anything else
// is refused until they do. Options.TLS must be set.
func (s *Server) ServeTLS(ctx context.Context, l net.Listener) error {
	if s.opts.TLS == nil {
		l.Close()
		return errors.New("serve TLS: no certificate")
	}
	return s.serve(ctx, l, true)
}

func (s *Server) serve(ctx context.Context, l net.Listener, mustTLS bool) error {
	defer l.Close()
	if !s.addListener(l) {
		return nil
	}
	defer s.removeListener(l)
	defer context.AfterFunc(ctx, func() { l.Close() })()

	for {
		conn, err := l.Accept()
		switch {
		case err == nil:
			s.start(conn, mustTLS)
		case errors.Is(err, net.ErrClosed) && (s.stopping.Load() || ctx.Err() != nil):
			return nil
		case temporary(err):
			// Out of file descriptors, most likely: others will close some.
			s.opts.Log.Warn("accept", "err", err)
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
			}
		default:
			return err
		}
	}
}

func temporary(err error) bool {
	var t interface{ Temporary() bool }
	return errors.As(err, &t) && t.Temporary()
}

func (s *Server) addListener(l net.Listener) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping.Load() {
		return false
	}
	s.listeners[l] = struct{}{}
	return true
}

func (s *Server) removeListener(l net.Listener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.listeners, l)
}
